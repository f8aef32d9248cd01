"""Hot operations behind one seam each: a plain statement and a fast form with the same signature."""
