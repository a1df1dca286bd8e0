"""What the model mixins ask of a test class: small models, pictures and labels, for ours and for the peers."""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from conformance.distribution import common


modeling, configuration = common("test_modeling_common"), common("test_configuration_common")
pipelines, training = common("test_pipeline_mixin"), common("test_training_mixin")

BATCH_SIZE, NUM_LABELS, NUM_QUERIES, NUM_LAYERS, HEADS, SIDE = 3, 3, 12, 2, 2, 64


def labels() -> list[dict]:
    """Return two boxes for each picture."""
    boxes = torch.tensor([[0.3, 0.4, 0.3, 0.2], [0.6, 0.6, 0.4, 0.5]])
    return [{"class_labels": torch.tensor([0, 2]), "boxes": boxes.clone()} for _ in range(BATCH_SIZE)]


class ModelTester:
    """The small model of a family, as the mixins address it.

    Args:
        config: of the model; copied for each test.
    """

    batch_size, num_labels, is_training = BATCH_SIZE, NUM_LABELS, True
    num_hidden_layers, num_attention_heads = NUM_LAYERS, HEADS
    seq_length = encoder_seq_length = decoder_seq_length = NUM_QUERIES

    def __init__(self, config):
        self.config = config
        self.hidden_size = config.hidden_size

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": modeling.floats_tensor([BATCH_SIZE, 3, SIDE, SIDE])}


class ModelTests(modeling.ModelTesterMixin, pipelines.PipelineTesterMixin, training.TrainingTesterMixin):
    """All mixins of a detector's models.

    Attributes:
        all_model_classes: the base model and the detector.
        image_processor: of the detector.
        config: returns the config of a small model.
        common_properties: fields of the config that the config tester looks for.
    """

    image_processor = None
    common_properties = None
    test_can_init_all_missing_weights_before_2023 = True  # else it is left out, by the year of a file's copyright

    @staticmethod
    def config():
        raise NotImplementedError

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        base, detector = cls.all_model_classes
        cls.pipeline_model_mapping = {"object-detection": detector, "image-feature-extraction": base}
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        for model_class in cls.all_model_classes:
            path = Path(cls.folder.name) / model_class.config_class.model_type / model_class.__name__
            torch.manual_seed(0)
            model_class(cls.config()).save_pretrained(path)
            cls.image_processor.save_pretrained(path)
        processor = type(cls.image_processor).__name__
        summary = {"tokenizer_classes": [], "processor_classes": [processor]}
        replaced = {
            "TRANSFORMERS_TINY_MODEL_PATH": cls.folder.name,
            "transformers_module": SimpleNamespace(**{processor: type(cls.image_processor)}),
            "tiny_model_summary": {model_class.__name__: summary for model_class in cls.all_model_classes},
            "pipeline_test_mapping": pipelines.pipeline_test_mapping
            | {
                "object-detection": {"test": f"{__name__}.ObjectDetectionPipelineTests"},
                "image-feature-extraction": {"test": f"{__name__}.ImageFeatureExtractionPipelineTests"},
            },
        }
        for name, value in replaced.items():
            cls.enterClassContext(patch.object(pipelines, name, value))
        # Which models have no loss is looked up in the library's table.
        names = {base.config_class.model_type: base.__name__}
        cls.enterClassContext(patch.dict(modeling.MODEL_MAPPING_NAMES, names))

    def setUp(self):
        super().setUp()
        modeling.global_rng.seed(0)  # of the pictures: the same counts every time
        self.model_tester = ModelTester(self.config())
        self.config_tester = configuration.ConfigTester(
            self,
            config_class=self.all_model_classes[0].config_class,
            has_text_modality=False,
            common_properties=self.common_properties,
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is self.all_model_classes[1]:
            inputs_dict["labels"] = labels()
        return inputs_dict

    # The training mixin has a loop for texts only. It runs on pictures once it is told that they are.
    def _get_trainable_model_class(self):
        return self.all_model_classes[1]

    def _get_model_modality(self):
        return "text"

    def _create_text_training_batch(self, **kwargs):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return inputs | {"labels": labels()}

    def test_training_overfit(self):
        with patch.object(self.all_model_classes[0].config_class, "vocab_size", 0, create=True):
            super().test_training_overfit()


class _PipelineTests:
    """What the pipeline mixin hands a pipeline to; its own classes are not in the distribution."""

    task = None

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **kwargs):
        random = np.random.default_rng(0)
        pictures = [Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(3)]
        return pipeline(self.task, model=model, image_processor=image_processor, dtype=dtype), pictures


class ObjectDetectionPipelineTests(_PipelineTests):
    """Every detection has a score, a label of the config and a box."""

    task = "object-detection"

    def run_pipeline_test(self, detector, pictures):
        for picture in pictures:
            found = detector(picture, threshold=0.0)
            assert len(found) > 0
            for detection in found:
                assert 0 <= detection["score"] <= 1
                assert detection["label"] in detector.model.config.label2id
                assert set(detection["box"]) == {"xmin", "ymin", "xmax", "ymax"}
            middle = sorted(detection["score"] for detection in found)[len(found) // 2]
            kept = detector(picture, threshold=middle)
            assert kept == [detection for detection in found if detection["score"] > middle]


class ImageFeatureExtractionPipelineTests(_PipelineTests):
    """A picture gives the first output of its model, as lists."""

    task = "image-feature-extraction"

    def run_pipeline_test(self, extractor, pictures):
        for picture in pictures:
            features = np.array(extractor(picture))
            assert features.shape[0] == 1 and features.size and np.isfinite(features).all()
