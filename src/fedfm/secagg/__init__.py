"""Mathematics and state machines of secure aggregation: messages in, messages out. The channel (:mod:`fedfm.channels`) carries them.

=================  ===================================================================================
``shamir``         secrets under shares in a prime field
``masks``          keystreams, and how they are added to a vector
``graph``          who shares a mask with whom, and how many shares open a secret
``quantise``       an answer as integers of a ring, and a sum of them as an answer
``checksum``       linear tags that find a garbled upload
``agreement``      hybrid key agreement between two clients, signatures, keys of a context
``terms``          what all clients of one sum agree on, and its digest: the context
``member``         the client's side of one sum, with every check before a share leaves
``collector``      the server's side of one sum
=================  ===================================================================================

Secrets come from the operating system (``secrets``); no module here imports ``random`` or ``numpy.random``.
"""
