"""The same tests on transformers' own detectors, to know which of them such a model fails."""

import unittest

from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DeformableDetrModel,
    DFineConfig,
    DFineForObjectDetection,
    DFineModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrModel,
)

from conformance.image_processors import ImageProcessorTests
from conformance.models import HEADS, NUM_LABELS, NUM_LAYERS, NUM_QUERIES, ModelTests
from conftest import tiny_resnet


WIDTH, OUTPUTS = 32, ["stage2", "stage3", "stage4"]


def backbone():
    config = tiny_resnet()
    config.out_features = OUTPUTS
    return config


class TestDeformableDetr(ModelTests, unittest.TestCase):
    all_model_classes = (DeformableDetrModel, DeformableDetrForObjectDetection)
    image_processor = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})

    @staticmethod
    def config():
        return DeformableDetrConfig(
            backbone_config=backbone(),
            d_model=WIDTH,
            encoder_layers=NUM_LAYERS,
            decoder_layers=NUM_LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH,
            num_queries=NUM_QUERIES,
            num_labels=NUM_LABELS,
        )


def rt_detr(config_class):
    return config_class(
        backbone_config=backbone(),
        encoder_in_channels=backbone().hidden_sizes[1:],
        encoder_hidden_dim=WIDTH,
        decoder_in_channels=[WIDTH] * len(OUTPUTS),
        d_model=WIDTH,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        decoder_layers=NUM_LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        num_queries=NUM_QUERIES,
        num_denoising=0,
        num_labels=NUM_LABELS,
    )


class TestRTDetr(ModelTests, unittest.TestCase):
    all_model_classes = (RTDetrModel, RTDetrForObjectDetection)
    image_processor = RTDetrImageProcessor(size={"height": 64, "width": 64})

    @staticmethod
    def config():
        return rt_detr(RTDetrConfig)


class TestDFine(ModelTests, unittest.TestCase):
    all_model_classes = (DFineModel, DFineForObjectDetection)
    image_processor = RTDetrImageProcessor(size={"height": 64, "width": 64})

    @staticmethod
    def config():
        return rt_detr(DFineConfig)


class TestDeformableDetrImageProcessor(ImageProcessorTests, unittest.TestCase):
    processor_class, settings = DeformableDetrImageProcessor, {"size": {"shortest_edge": 42, "longest_edge": 80}}


class TestRTDetrImageProcessor(ImageProcessorTests, unittest.TestCase):
    processor_class, settings = RTDetrImageProcessor, {"size": {"height": 42, "width": 42}}
