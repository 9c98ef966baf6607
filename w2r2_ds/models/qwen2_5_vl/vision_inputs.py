"""What the vision tower reads off the patch grids, made on the host beforehand so that the device is never asked.

transformers (5.18 and later) takes these by name instead of working them out; of a grid on the device that would be a
few reads per image, which make the host wait.
"""

from __future__ import annotations
