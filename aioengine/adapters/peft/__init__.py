"""PEFT adapter folders: configuration and weights read, checked and packed in slot order."""
