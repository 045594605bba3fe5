package access

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"strings"
	"time"
)

// Token is what is kept of a token: everything but its secret.
type Token struct {
	ID      string    `json:"id"`
	SHA256  string    `json:"sha256"` // of the secret's 32 bytes, hex
	Roles   []Role    `json:"roles"`
	Job     string    `json:"job,omitempty"`  // the only job it is good for; "": all
	Note    string    `json:"note,omitempty"` // for people
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"`
	Revoked time.Time `json:"revoked,omitzero"`
}

// alive says whether the token is good at a time, and why not.
func (t Token) alive(now time.Time) (ok bool, why string) {
	switch {
	case !t.Revoked.IsZero():
		return false, "revoked"
	case !t.Expires.IsZero() && !now.Before(t.Expires):
		return false, "expired"
	}
	return true, ""
}

// A token's text is longer than any request id that the server takes over from
// a client (64), so that one sent in the wrong header cannot reach a log.
const (
	tokenPrefix = "trainerd_"
	idBytes     = 8
	secretBytes = 32
)

// mint draws a token. The text is shown once and kept nowhere.
func mint() (t Token, text string) {
	var id [idBytes]byte
	var secret [secretBytes]byte
	rand.Read(id[:]) // never fails: the program ends without entropy
	rand.Read(secret[:])
	sum := sha256.Sum256(secret[:])
	t = Token{ID: hex.EncodeToString(id[:]), SHA256: hex.EncodeToString(sum[:])}
	return t, tokenPrefix + t.ID + "_" + hex.EncodeToString(secret[:])
}

// parse splits a token's text. What is no token gives a zero secret and ok false.
func parse(text string) (id string, secret [secretBytes]byte, ok bool) {
	rest, ok := strings.CutPrefix(text, tokenPrefix)
	id, encoded, cut := strings.Cut(rest, "_")
	if !ok || !cut || len(id) != 2*idBytes {
		return "", secret, false
	}
	raw, err := hex.DecodeString(encoded)
	if err != nil || len(raw) != secretBytes {
		return "", secret, false
	}
	copy(secret[:], raw)
	return id, secret, true
}

// holds compares a secret with what is kept, in time that depends on neither.
func (t Token) holds(secret [secretBytes]byte) bool {
	sum := sha256.Sum256(secret[:])
	kept, err := hex.DecodeString(t.SHA256)
	if err != nil || len(kept) != len(sum) {
		kept = make([]byte, len(sum)) // no secret is known that hashes to zero
	}
	return subtle.ConstantTimeCompare(sum[:], kept) == 1
}
