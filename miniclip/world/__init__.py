"""A world of coloured shapes: pictures with exact masks, and captions that are provably true.

A `Scene` has one to three shapes, none covering another, on a quiet background. A picture is drawn
from its scene, so every caption can be checked, and every object's pixels are known. This answers
three questions that photographs leave open:

- Does a model know a colour and a shape together that it never saw together? No training picture
  and no training caption has a pair of `HELD_OUT`, but each of its words.
- Does it read the order of words? "a red circle to the left of a blue square" has a false caption
  with the same words. Plain contrastive training makes models that read a bag of words; training
  with false captions teaches the order (Yuksekgonul et al. 2022, arXiv 2210.01936).
- Does a heat map point at the object? The masks say where it is.

Everything is a pure function of numbers: scene 7 of seed 0 is always the same scene.
"""
