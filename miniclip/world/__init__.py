"""A world of coloured shapes: pictures, exact masks, and captions that are true or false by proof.

One to three shapes, none covering another, on a quiet background. Each picture is drawn from a
`Scene`, so every caption can be checked, and every object's pixels are known. This allows three
questions that photographs leave open:

- Does a model know a colour and a shape in a pair it was never shown? `HELD_OUT` pairs are in no
  training picture and in no training caption, but each of their words is.
- Does it read the order of words? "a red circle to the left of a blue square" has a false caption
  with the same words: "a blue square to the left of a red circle". A model that reads a caption as
  a bag of words cannot tell them apart, and plain contrastive training makes such models
  (Yuksekgonul et al. 2022, arXiv 2210.01936). The remedy of that paper is to train with false
  captions: every `Pair` brings one.
- Does an attention map look where the object is? The masks say where it is.

Everything is a pure function of numbers: scene 7 of seed 0 is always the same scene.
"""
