"""What tests of engines share."""

from state_fixtures import make_model, saved, small_shards

__all__ = ["make_model", "saved", "small_shards"]
