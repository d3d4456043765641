"""Adapters that become one LoRA pair when they are read: those of other PEFT methods, and mixes."""
