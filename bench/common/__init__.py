"""What every measurement needs: the checkout and its results, timing, roofs, tables. Importing it makes fastpeft
importable from a checkout that is not installed."""

from common.tree import ensure_importable

ensure_importable()
