"""Importing this package registers our models with timm."""

from cit_scale.models import cit as cit
from cit_scale.models import rednet as rednet
