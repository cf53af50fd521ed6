"""Schedulers that start training on a cluster: a process on this machine submits a job, follows it and cancels it."""
