"""Callbacks and wrappers for training libraries; each imports its library when it is used.

=====================================  ========================================================
library                                what to write
=====================================  ========================================================
Lightning                              ``integrations.lightning.QuantizeTraffic(policy)``
transformers' Trainer                  ``integrations.transformers.QuantizeTraffic(policy)``
torchtitan                             ``integrations.torchtitan.quantized(model_spec, policy)``
accelerate                             ``rf.quantize_traffic(model, policy)`` after ``prepare``
=====================================  ========================================================
"""
