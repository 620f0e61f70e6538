"""What tests of data share."""

from state_fixtures import count, folder, make_model, saved, small_shards

__all__ = ["count", "folder", "make_model", "saved", "small_shards"]
