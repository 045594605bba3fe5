// Package delta is the format in which one version of a file becomes another by
// overwriting the words that differ: between two steps of a policy most values
// of a reduced precision stay what they were.
//
// A delta is a stream, read once from its beginning. Numbers called uvarint are
// as in encoding/binary, at most 64 bits; digests are SHA-256.
//
//	magic     8 bytes "trdelta" 0x0a
//	version   1 byte, 1
//	files     each:
//	  mark    1 byte, 1
//	  name    uvarint length (1 to 512), bytes
//	  size    uvarint, bytes of the file before and after
//	  word    1 byte: 1, 2, 4 or 8 bytes
//	  base    32 bytes, digest of the file before
//	  target  32 bytes, digest of the file after
//	  runs    each: uvarint h, where h-1 = 2*gap + many; with many, a uvarint n-2, else n is 1;
//	          then n words. The run begins gap words after the end of the one before.
//	  end     uvarint 0
//	  tail    the last size mod word bytes of the file after, as they are
//	  check   CRC-32C (Castagnoli) of the file's bytes from mark to tail, little-endian
//	end       1 byte, 0; uvarint count of files
//
// Runs hold values, not differences, so that applying a delta to its own result
// changes nothing. What is applied is verified against the digest of the target.
//
// Read write.go, then read.go. The package knows nothing of checkpoints.
package delta
