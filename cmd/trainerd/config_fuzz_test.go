package main

import (
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzConfigFile reads bytes as a configuration file: no panic, and what was
// taken is taken the same when it is written out and read again.
func FuzzConfigFile(f *testing.F) {
	whole, err := json.Marshal(DefaultConfig())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	for _, s := range []string{`{}`, `{"workers":1,"workers":2}`, `{"shutdown":"5s","drain":null}`, `{"Listen":"x"}`, `[]`, `{"model_root":"/a,/b"}`, `{"peak_tflops":1e400}`, "\xef\xbb\xbf{}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c := DefaultConfig()
		if fromFile(membersOf(&c), raw) != nil {
			return
		}
		first, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		d := DefaultConfig()
		if err := fromFile(membersOf(&d), first); err != nil {
			t.Fatalf("%v in what was written: %s", err, first)
		}
		second, err := json.Marshal(d)
		if err != nil || !bytes.Equal(first, second) {
			t.Errorf("%s, then %s (%v)", first, second, err)
		}
	})
}
