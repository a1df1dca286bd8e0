"""A page in the browser that shows what a detector sees; also as a folder for a Hugging Face Space."""
