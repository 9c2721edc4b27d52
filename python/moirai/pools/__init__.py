from moirai._native import Lease
from moirai.pools.objects import ObjectPool, Overflow
from moirai.pools.records import Acquisition, PoolStatistics

__all__ = ["Acquisition", "Lease", "ObjectPool", "Overflow", "PoolStatistics"]
