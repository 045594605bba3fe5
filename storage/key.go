package storage

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"trainerd/internal/fault"
)

const (
	// MaxKey bounds a key in bytes. S3 allows 1024; the rest is room for a store's own prefix.
	MaxKey = 768
	// maxElement bounds one element of a key: what common file systems allow.
	maxElement = 255
	// Reserved is the first element that stores keep for themselves.
	Reserved = ".trainerd"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// CheckKey refuses keys that some store cannot hold or that could leave its
// root: empty or longer than MaxKey, absolute, with empty, "." or ".."
// elements, with backslashes or control characters, not UTF-8, or under Reserved.
func CheckKey(key string) error {
	why := keyFault(key)
	if why == "" {
		return nil
	}
	shown := key
	if len(shown) > 80 {
		shown = shown[:80] + "…"
	}
	return &fault.Error{Kind: fault.Invalid, Code: "bad_key",
		Fields: []fault.Field{{Name: "key", Row: -1, Got: strconv.Quote(shown), Expected: why}}}
}

// keyFault returns what was expected instead of key, "" when key is fine.
func keyFault(key string) string {
	switch {
	case key == "":
		return "a name that is not empty"
	case len(key) > MaxKey:
		return "at most " + strconv.Itoa(MaxKey) + " bytes"
	case !utf8.ValidString(key):
		return "valid UTF-8"
	case strings.HasPrefix(key, "/"):
		return "a relative name"
	}
	for _, r := range key {
		if r < 0x20 || r == 0x7f || r == '\\' {
			return "no control characters and no backslashes"
		}
	}
	first := true
	for element := range strings.SplitSeq(key, "/") {
		switch {
		case element == "" || element == "." || element == "..":
			return `no empty, "." or ".." elements`
		case len(element) > maxElement:
			return "elements of at most " + strconv.Itoa(maxElement) + " bytes"
		case first && element == Reserved:
			return "another first element than " + strconv.Quote(Reserved)
		}
		first = false
	}
	return ""
}
