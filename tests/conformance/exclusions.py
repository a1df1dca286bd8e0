"""Common tests that our classes are known to fail, and why. They run all the same: one that passes is reported."""

EXCLUSIONS = {
    "test_model_get_set_embeddings": "queries are no embedding of tokens; so with every peer",
    "test_resize_tokens_embeddings": "queries are no embedding of tokens; so with every peer",
    "test_pipeline_image_feature_extraction": "the pipeline divides a batch along the first index of every output, "
    "which in `stages` is the stage; so with RT-DETR and D-FINE",
    "test_pipeline_image_feature_extraction_fp16": "as test_pipeline_image_feature_extraction",
    "test_training_overfit": "made for texts: asks that the norm of the gradient falls by 90 %; so with two peers",
}
