"""Stages that run the model's own forward, unedited.

Every stage calls the ``forward`` of a copy of the model's tree that shares its tensors. In the copy *gates* stand in
place of what has tensors: the model's layers, and around them its outer modules (embeddings, norms, heads, projectors).
One forward of the model on a sample, recorded, gives the chain of their calls, and each stage a part of it:

    chain     embed   layer 0   layer 1   layer 2   layer 3   norm   head
    stage 0   runs    runs      runs │ ends
    stage 1   past    past      past      runs      runs      runs   runs

A call that is past returns what was received, or what has the right form and is not a number where nobody needs more.
What comes between the calls (masks, rotary embeddings, loops, the loss) is the model's own code and runs on every
stage. What must travel is what that code cannot do without, which a rehearsal finds out (``rehearsal``); and all
of it is verified against the model as it is before anything is trained (``verify``).
"""
