"""Servers that sample in a process of their own: start and end, HTTP, weights by folder or by NCCL."""
