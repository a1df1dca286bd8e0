"""What the image processor mixin asks of a test class, the same for ours and for the peers."""

from conformance.distribution import common


processing = common("test_image_processing_common")


class ImageProcessorTests(processing.ImageProcessingTestMixin):
    """The mixin on one class with small pictures.

    Attributes:
        processor_class: the image processor.
        settings: what it is made with.
    """

    test_cast_dtype = True
    processor_class, settings = None, {}

    def image_processor_tester_class(self, parent):
        return ImageProcessorTester(parent, **self.settings)

    def expected_shape(self, images, expected):
        """Return the shape `(3, H, W)` of a batch of pictures where it is not the library's, `expected`."""
        return expected


class ImageProcessorTester(processing.ImageProcessingTester):
    """Pictures for the mixin; the class under test is named, not found by the folder's name."""

    def _get_image_processing_classes(self):
        return {"torchvision": self.parent.processor_class}

    def expected_output_image_shape(self, images):
        return self.parent.expected_shape(images, super().expected_output_image_shape(images))
