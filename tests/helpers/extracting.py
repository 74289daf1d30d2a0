"""Extractions that are watched and interrupted, for the tests of features files."""

import dataclasses

import torchvision

from fpl.data import extraction
from fpl.data.views import Views

CHUNK = 20
VIEWS = Views(2)
PER_IMAGE = {"feats": 1, "patches": 1, "views": 2}


def extract(manifest, tower, path, content, **settings):
    """Extract with two views of an image, where these are the content."""
    options = extraction.Options(**settings)
    return extraction.extract(manifest, tower, path, content, VIEWS, options)


class Stop(BaseException):
    """The interruption, which is no fault of an image."""


class Counting:
    """A step of the transform that changes nothing; counts its images and stops at one of them."""

    def __init__(self, stop_at=None):
        self.stop_at, self.calls = stop_at, 0

    def __call__(self, image):
        if self.calls == self.stop_at:
            raise Stop
        self.calls += 1
        return image


def stepping(tower, *steps):
    """The tower with a transform that begins with some other steps."""
    transforms = [*steps, *tower.transform.transforms]
    return dataclasses.replace(tower, transform=torchvision.transforms.Compose(transforms))
