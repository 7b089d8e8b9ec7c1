"""Tokenizing a task once, with Apache Beam, into a store."""
