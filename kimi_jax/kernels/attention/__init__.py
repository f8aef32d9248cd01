"""Attention inside segments: softmax attention of packed rows, and MLA over a mesh."""
