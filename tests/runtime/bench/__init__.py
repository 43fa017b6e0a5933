"""Tests of dspark_edge.runtime.bench."""
