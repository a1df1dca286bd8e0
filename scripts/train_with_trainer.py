"""Fine-tune D-RMM with transformers' own `Trainer` instead of `drmm train`, with COCO's AP on the validation split.

python scripts/train_with_trainer.py --data COCO_FOLDER --init-from runs/mine/best --output runs/trainer

What the Trainer does not have: a moving average, learning rates by module, steps skipped where the loss is not finite.
"""

import argparse

import torch
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments

from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.augmentation import build_augmentation
from drmm_hf.data.coco import categories, load_detection_dataset
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import DetectionDataset, collate
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import measure
from drmm_hf.modeling.modeling_drmm import DrmmObjectDetectionOutput


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and return the figures of the validation split."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="COCO, YOLO, Pascal VOC folder or Hub id")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--val-split", default="val")
    parser.add_argument("--init-from", help="folder or Hub id of a D-RMM model; a fresh one by default")
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=float, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--shortest-edge", type=int, default=480)
    parser.add_argument("--longest-edge", type=int, default=800)
    args = parser.parse_args(arguments)

    train_set = load_detection_dataset(args.data, args.train_split)
    val_set = load_detection_dataset(args.data, args.val_split)
    annotations = ground_truth(val_set)
    label_map = LabelMap.from_categories(categories(train_set))
    classes = {
        "id2label": label_map.id2label,
        "label2id": label_map.label2id,
        "category_ids": list(label_map.category_ids),
    }
    size = {"shortest_edge": args.shortest_edge, "longest_edge": args.longest_edge}
    if args.init_from is None:
        model, processor = DrmmForObjectDetection(DrmmConfig(**classes)), DrmmImageProcessor(size=size)
    else:
        model = AutoModelForObjectDetection.from_pretrained(args.init_from, ignore_mismatched_sizes=True, **classes)
        processor = DrmmImageProcessor.from_pretrained(
            args.init_from, size=size, calibration=None, score_threshold=None
        )

    original_sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}

    def compute_metrics(evaluated) -> dict[str, float]:
        """Measure by the untouched annotations; predictions come batch by batch, as `eval_do_concat_batches` says.

        Of the labels only `image_id` is read: in an incomplete last batch the Trainer cuts their tensors short.
        """
        detections = Detections()
        for arrays, labels in zip(evaluated.predictions, evaluated.label_ids, strict=True):
            names = ("logits", "pred_boxes", "box_scales", "objectness_logits", "class_logits", "scale_freedom")
            outputs = DrmmObjectDetectionOutput(**dict(zip(names, map(torch.as_tensor, arrays), strict=True)))
            image_ids = [label["image_id"].item() for label in labels]
            sizes = [original_sizes[image_id] for image_id in image_ids]
            results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            for image_id, result in zip(image_ids, results, strict=True):
                if image_id not in detections:  # several processes repeat pictures to share them evenly
                    detections.add(image_id, result)
        metrics = measure(detections, annotations, dict(enumerate(label_map.category_ids)))
        return {name: metrics[name] for name in ("AP", "AP50", "AP75", "ECE") if metrics[name] is not None}

    training = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=1e-4,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="AP",
        eval_do_concat_batches=False,  # predictions and labels stay together, picture by picture
        remove_unused_columns=False,  # the Trainer does not see that the collator needs them
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=training,
        data_collator=collate(processor, do_resize=True),
        train_dataset=DetectionDataset(train_set, label_map, build_augmentation("flip")),
        eval_dataset=DetectionDataset(val_set, label_map),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
