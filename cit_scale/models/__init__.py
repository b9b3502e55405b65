"""CiT and RedNet. Importing this package registers them with timm."""

from cit_scale.models import cit as cit
from cit_scale.models import rednet as rednet
