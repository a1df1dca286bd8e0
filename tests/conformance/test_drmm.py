"""The common tests on our classes: both decoders with both heads, and the image processor."""

import unittest

import numpy as np
from transformers.image_utils import get_image_size, infer_channel_dimension_format

from conformance.image_processors import ImageProcessorTests
from conformance.models import HEADS, NUM_LABELS, NUM_LAYERS, NUM_QUERIES, ModelTests
from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor, DrmmModel


class DrmmTests(ModelTests):
    all_model_classes = (DrmmModel, DrmmForObjectDetection)
    image_processor = DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    common_properties = ["hidden_size", "num_attention_heads", "num_hidden_layers", "num_queries"]
    decoder, head = {}, {}

    @classmethod
    def config(cls):
        fields = {"num_labels": NUM_LABELS, "num_stages": NUM_LAYERS, "num_attention_heads": HEADS}
        return tiny_config(num_queries=NUM_QUERIES, **fields, **cls.decoder, **cls.head)


class SparseRcnn(DrmmTests):
    decoder = {"decoder_type": "sparse_rcnn"}


class AdaMixer(DrmmTests):
    decoder = {"decoder_type": "adamixer", "hidden_size": 32, "num_sampling_points": 4, "num_mixing_points": 8}


class TestSparseRcnnMixture(SparseRcnn, unittest.TestCase):
    head = {"head_type": "mixture"}


class TestSparseRcnnBox(SparseRcnn, unittest.TestCase):
    head = {"head_type": "box"}


class TestAdaMixerMixture(AdaMixer, unittest.TestCase):
    head = {"head_type": "mixture"}


class TestAdaMixerBox(AdaMixer, unittest.TestCase):
    head = {"head_type": "box"}


class TestDrmmImageProcessor(ImageProcessorTests, unittest.TestCase):
    processor_class, settings = DrmmImageProcessor, {"size": {"shortest_edge": 42, "longest_edge": 80}}

    def expected_shape(self, images, expected):
        """Ours rounds where the library truncates, and pads to a multiple of 32."""
        images = [np.asarray(image) for image in images]
        layouts = [infer_channel_dimension_format(image, num_channels=(3, 4)) for image in images]
        sizes = np.array([get_image_size(*pair) for pair in zip(images, layouts, strict=True)])
        scale = np.minimum(80 / sizes.max(axis=1), 42 / sizes.min(axis=1))
        largest = np.floor(sizes * scale[:, None] + 0.5).max(axis=0)
        return expected[0], *(np.ceil(largest / 32) * 32)
