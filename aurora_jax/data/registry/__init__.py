"""SeqIO and TensorFlow, behind one door."""
