"""A world of coloured shapes: images with exact masks, and captions that are provably true.

A `Scene` has one to three shapes, which do not touch, on a dark background. The image is drawn from
the scene, so every caption can be checked, and every object's pixels are known. So these images
can answer three questions that are hard to answer with photographs:

- Does a model recognise a pair of colour and shape that training never showed? The pairs in
  `HELD_OUT` are in no training image or caption. Their colours and shapes are in other pairs.
- Does a model read the order of words? "a red circle to the left of a blue square" becomes false if
  two words are exchanged. Plain contrastive training gives models that ignore the order.
  Training with false captions teaches the order (Yuksekgonul et al. 2022, arXiv 2210.01936).
- Does a heat map point at the object? The masks say where the object is.

A scene depends only on the arguments of `scene`, so scene 7 of seed 0 is always the same scene.
"""
