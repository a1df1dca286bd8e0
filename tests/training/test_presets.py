import pytest
import torch

from drmm_hf import DrmmConfig, DrmmImageProcessor
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.training.arguments import TrainingArguments
from drmm_hf.training.build import load_split
from drmm_hf.training.loop import train
from drmm_hf.training.presets import GRIDS, bound_warmup, choose_recipe, describe, few, many


FACTS = {"num_images": 205, "width": 640, "height": 480, "shortest_edge": 480, "most": 29}


@pytest.fixture
def shapes(tmp_path):
    """A COCO folder of 12 training and 3 validation pictures."""
    for split, count in (("train", 12), ("val", 3)):
        save_coco(generate_shapes(count, count, (64, 64)), tmp_path / "shapes", split)
    return tmp_path / "shapes"


@pytest.mark.parametrize("num_images", [50, 500, 2000, 5000, 100_000])
@pytest.mark.parametrize("most", [1, 40, 101, 900])
@pytest.mark.parametrize("edge", [40, 240, 480, 3000])
def test_whatever_the_data_the_recipe_is_valid(num_images, most, edge):
    choose = few if num_images <= 2000 else many
    sections = choose({**FACTS, "num_images": num_images, "most": most, "shortest_edge": edge})
    config = DrmmConfig(**sections["model"])
    assert config.num_queries >= min(3 * most, max(GRIDS))
    data = sections["data"]
    assert data["shortest_edge"] in data["short_edges"] and data["longest_edge"] >= data["shortest_edge"]
    assert all(
        name in {note.partition(":")[0] for note in sections["notes"]} for name in ("num_queries", "shortest_edge")
    )
    if num_images > 2000 and edge >= 800:  # the paper's sizes
        assert data["short_edges"] == list(range(480, 801, 32))
        assert (data["crop_short_edges"], data["crop_sizes"], data["longest_edge"]) == (
            [400, 500, 600],
            [384, 600],
            1333,
        )


def test_more_pictures_need_fewer_epochs():
    epochs = [few({**FACTS, "num_images": number})["training"]["epochs"] for number in (50, 500, 2000)]
    epochs.append(many({**FACTS, "num_images": 5000})["training"]["epochs"])
    assert epochs == sorted(epochs, reverse=True) and len(set(epochs)) == 4


def test_the_facts_are_those_of_the_pictures(shapes):
    dataset = generate_shapes(12, 12, (64, 96))
    most = max(len(row["objects"]) for row in dataset)
    assert describe(dataset) == {"num_images": 12, "width": 96, "height": 64, "shortest_edge": 64, "most": most}


def test_what_is_chosen_is_said_and_what_is_given_wins(shapes):
    recipe, notes = choose_recipe(str(shapes), {"backbone-weights": "none", "num_queries": "500", "max-steps": "3"})
    assert "12 training pictures, 64 x 64" in notes[0]
    assert recipe.model["decoder_type"] == "adamixer"
    assert (recipe.training.backbone_weights, recipe.training.epochs, recipe.training.max_steps) == ("none", None, 3)
    recipe, notes = choose_recipe(str(shapes), {})
    assert recipe.training.backbone_weights == "timm/tf_efficientnet_lite0.in1k"
    assert any("from the Hub" in note for note in notes)
    _, notes = choose_recipe(str(shapes), {"backbone_weights": "lite0.safetensors"})
    assert "backbone_weights: lite0.safetensors, as given" in notes
    assert any(note.startswith("augmentation: paper (") for note in notes)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(("minutes", "edge"), [(0.5, 240), (8, 240), (55, 240), (110, 336), (1000, 480), (None, 480)])
def test_minutes_on_a_cpu_have_smaller_pictures(minutes, edge):
    """Not smaller than what was measured in 55 minutes, and not larger than their own; so many are then seen again."""
    assert few(FACTS, minutes=minutes)["data"]["shortest_edge"] == edge
    notes = few(FACTS, minutes=minutes)["notes"]
    assert any("smaller pictures are seen more often" in note for note in notes) == (edge < 480)
    assert few({**FACTS, "shortest_edge": 200}, minutes=minutes)["data"]["shortest_edge"] == 192
    assert few(FACTS, 320, minutes)["data"]["shortest_edge"] == 320
    training = few(FACTS, minutes=minutes)["training"]
    assert training["batch_size"] == training["learning_rate_batch_size"] == (4 if minutes else 8)


def test_minutes_bound_the_input_and_the_warm_up_and_say_so(tmp_path, cpu, monkeypatch):
    save_coco(generate_shapes(2, 0, (480, 640)), tmp_path / "shapes", "train")
    save_coco(generate_shapes(1, 0, (480, 640)), tmp_path / "shapes", "val")
    recipe, notes = choose_recipe(str(tmp_path / "shapes"), {"max-minutes": "8"})
    assert (recipe.data.shortest_edge, recipe.training.schedule_by) == (240, "time")
    assert "warmup_steps: 100, or the first tenth of the 8 minutes if that is shorter" in notes
    assert any(
        note.startswith("shortest_edge: 240, not the pictures' own 480: in 8 minutes on a CPU") for note in notes
    )
    recipe, notes = choose_recipe(str(tmp_path / "shapes"), {"max_minutes": "8", "warmup-steps": "7"})
    assert recipe.training.warmup_steps == 7 and "warmup_steps: 7, as given" in notes
    monkeypatch.setattr("drmm_hf.training.presets.FEW", 1)  # too many pictures for the compact detector, with time
    assert choose_recipe(str(tmp_path / "shapes"), {"max_minutes": "8"})[0].model["decoder_type"] == "adamixer"
    assert "decoder_type" not in choose_recipe(str(tmp_path / "shapes"), {})[0].model
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    recipe, _ = choose_recipe(str(tmp_path / "shapes"), {"max_minutes": "8"})
    assert recipe.data.shortest_edge == 480 and "decoder_type" not in recipe.model


@pytest.mark.parametrize(
    ("options", "processes", "warmup_steps", "steps"),
    [
        ({"epochs": 100}, 1, 100, 2600),
        ({"epochs": 10}, 1, 26, 260),
        ({"epochs": 10}, 2, 13, 130),
        ({"epochs": 10, "accumulation_steps": 2}, 1, 13, 130),
        ({"epochs": 10, "max_steps": 50}, 1, 5, 50),
        ({"max_steps": 3, "max_minutes": 9.0}, 1, 1, 3),
    ],
)
def test_a_warm_up_is_at_most_a_tenth_of_the_steps(monkeypatch, options, processes, warmup_steps, steps):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    training = TrainingArguments(batch_size=8, warmup_steps=100, **options)
    assert bound_warmup(training, 205) == f"warmup_steps: {warmup_steps}, at most a tenth of the {steps} steps"
    assert training.warmup_steps == warmup_steps


def test_a_model_that_goes_on_keeps_architecture_and_input_size(shapes, tmp_path):
    """A detector that was trained at another size than the pictures' own starts far below what it can."""
    DrmmConfig().save_pretrained(tmp_path)
    DrmmImageProcessor(size={"shortest_edge": 224, "longest_edge": 320}).save_pretrained(tmp_path)
    recipe, notes = choose_recipe(str(shapes), {"init_from": str(tmp_path)})
    assert (recipe.model, recipe.training.backbone_weights) == ({}, None)
    assert (recipe.data.shortest_edge, recipe.data.longest_edge) == (224, 320) and 224 in recipe.data.short_edges
    assert "shortest_edge: 224, that of init_from (longest_edge 320)" in notes
    assert not any(note.startswith(("detector", "num_queries")) for note in notes)
    recipe, notes = choose_recipe(str(shapes), {"init_from": str(tmp_path), "shortest_edge": "96"})
    assert (recipe.data.shortest_edge, recipe.data.longest_edge) == (96, 160)
    assert "shortest_edge: 96, as given" in notes
    DrmmConfig().save_pretrained(tmp_path / "fixed")
    DrmmImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "fixed")
    recipe, notes = choose_recipe(str(shapes), {"init_from": str(tmp_path / "fixed")})
    assert any("near the pictures' own 64" in note for note in notes)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="init_from is .*, whose preprocessor_config.json does not hold the settings"):
        choose_recipe(str(shapes), {"init_from": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="init_from '.*nothing' does not exist"):
        choose_recipe(str(shapes), {"init_from": str(tmp_path / "nothing")})


def test_pictures_are_held_out_where_there_is_no_validation_split(tmp_path):
    save_coco(generate_shapes(40, 0, (64, 64)), tmp_path / "shapes", "train")
    recipe, notes = choose_recipe(str(tmp_path / "shapes"), {"backbone_weights": "none"})
    assert any(note.startswith("holdout: 0.1") for note in notes)
    (kept, _), (held_out, annotations) = (load_split(recipe.data, split) for split in ("train", "val"))
    ids = kept["image_id"], held_out["image_id"]
    assert len(ids[0]) + len(ids[1]) == 40 and not set(ids[0]) & set(ids[1])
    assert 0 < len(ids[1]) < 12
    assert [image["id"] for image in annotations["images"]] == list(ids[1])
    save_coco(generate_shapes(5, 0, (64, 64)), tmp_path / "tests", "test")
    with pytest.raises(ValueError, match="no split called train"):
        choose_recipe(str(tmp_path / "tests"), {})


def test_a_chosen_recipe_trains(shapes, tmp_path):
    options = {"backbone_weights": "none", "max_steps": 1, "output_dir": str(tmp_path / "run"), "batch_size": 2}
    small = {"shortest_edge": 64, "short_edges": "[64]", "crop_short_edges": "[64]", "crop_sizes": "[48, 64]"}
    recipe, _ = choose_recipe(str(shapes), {**options, **small, "longest_edge": 96})
    assert train(recipe)["steps"] == 1


@pytest.mark.parametrize("choose", [few, many])
@pytest.mark.parametrize("edge", [20, 64, 100, 333, 1200])
def test_sizes_of_the_augmentation_follow_the_size_of_the_input(choose, edge):
    """In the same proportions as at the size that the pictures would have chosen, but for rounding to 16 pixels."""
    chosen, given = choose(FACTS)["data"], choose(FACTS, edge)["data"]
    assert given["shortest_edge"] == edge and edge in given["short_edges"]
    for name in ("longest_edge", "short_edges", "crop_short_edges", "crop_sizes"):
        expected, found = ([sizes] if name == "longest_edge" else sizes for sizes in (chosen[name], given[name]))
        for size in (min, max):
            assert size(found) == pytest.approx(size(expected) * edge / chosen["shortest_edge"], abs=17)


@pytest.mark.parametrize("edge", [48, 2000])
def test_a_size_that_is_given_is_said_to_be(shapes, edge):
    recipe, notes = choose_recipe(str(shapes), {"shortest-edge": str(edge), "num-queries": "300"})
    assert recipe.data.shortest_edge == edge <= max(recipe.data.short_edges) < 1.5 * edge
    assert recipe.data.longest_edge >= edge
    assert f"shortest_edge: {edge}, as given" in notes and "num_queries: 300, as given" in notes
    assert not any("pictures' own" in note or "at least 3" in note for note in notes)


def test_pictures_to_learn_by_heart_are_not_augmented(tmp_path):
    save_coco(generate_shapes(40, 0, (64, 64)), tmp_path / "shapes", "train")
    recipe, notes = choose_recipe(str(tmp_path / "shapes"), {"overfit": "4"})
    data = recipe.data
    assert (data.augmentation, data.colour_distortion, data.holdout) == ("none", 0, None)
    assert "augmentation: none, so that 4 pictures can be learnt by heart (overfit)" in notes
    assert not any(note.startswith(("holdout", "augmentation: flips")) for note in notes)
    recipe, notes = choose_recipe(str(tmp_path / "shapes"), {"overfit": "4", "augmentation": "flip"})
    assert recipe.data.augmentation == "flip" and "augmentation: flip, as given" in notes
