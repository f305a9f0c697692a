"""ONNX in, a layer's canonical graph out.

    onnx_file ──▶ fold (constants) ──▶ convert (operators, by a table) ──▶ rules ──▶ Graph

Reshapes, transposes, slices, splits and concatenations are no nodes: `views` keeps them as a choice
of columns, which then becomes a choice of a weight's rows. Masks, ALiBi and rotary positions are
recognised by their numbers (`positions`), activations and norms by what they compute (`rules`): not
by how they are spelled.
"""
