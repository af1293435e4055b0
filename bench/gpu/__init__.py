"""`make gpu`: the driver, its stages and what it is expected to take; the cost model beside measured rows."""

import common  # noqa: F401 - fastpeft becomes importable
