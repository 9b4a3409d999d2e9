"""The data check: whether images and captions are worth training on. Nothing is changed or deleted.

`look.py` measures an image while it is decoded, `folder.py` lists the images of a folder as the checks see them, each
check is a pure function of a folder in a file of its subject, and `check.py` runs all of them.
"""
