"""Data: annotation files and Hub sets -> one schema, class labels, augmentation, batches."""
