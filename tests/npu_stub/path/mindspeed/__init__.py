"""Stands for an installed MindSpeed, which nothing of ours imports."""

raise RuntimeError("mindspeed was imported")
