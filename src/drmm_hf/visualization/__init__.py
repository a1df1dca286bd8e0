"""Pictures: detections drawn on photographs, reliability diagrams and training curves."""
