"""Stands for MindSpeed where it is installed; nothing of ours imports it."""

raise RuntimeError("mindspeed was imported")
