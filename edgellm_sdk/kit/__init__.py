"""What method authors build with. Everything here may import torch."""
