"""CiT, RedNet, and any timm model with heads for teachers. Importing this package registers them with timm."""

from cit_scale.models import advised as advised
from cit_scale.models import cit as cit
from cit_scale.models import rednet as rednet
