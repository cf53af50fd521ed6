"""The second data engine: Apache Spark reads, numbers, splits and samples what one machine cannot; same tables."""
