package kernels

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFingerprintDifferences(t *testing.T) {
	was := Fingerprint{Device: "cuda", Card: "H100", Driver: "13.0", CublasLt: "13.1.0", Algorithms: "timed", Choices: map[string]string{"a": "1", "b": "2"}}
	with := func(change func(*Fingerprint)) Fingerprint {
		f := was
		f.Choices = map[string]string{"a": "1", "b": "2"}
		change(&f)
		return f
	}
	for _, c := range []struct {
		name string
		is   Fingerprint
		want []Difference
	}{
		{"the same", with(func(*Fingerprint) {}), nil},
		{"another product was met", with(func(f *Fingerprint) { f.Choices["c"] = "3" }), nil},
		{"timed anew", with(func(f *Fingerprint) { f.Choices["b"] = "9" }), []Difference{{"choices: b", "2", "9"}}},
		{"the file is lost", with(func(f *Fingerprint) { f.Choices = nil }), []Difference{{"choices: a", "1", ""}, {"choices: b", "2", ""}}},
		{"device", with(func(f *Fingerprint) { f.Device = "cpu" }), []Difference{{"device", "cuda", "cpu"}}},
		{"card", with(func(f *Fingerprint) { f.Card = "H200" }), []Difference{{"card", "H100", "H200"}}},
		{"instructions", with(func(f *Fingerprint) { f.Instructions = "x" }), []Difference{{"instructions", "", "x"}}},
		{"driver", with(func(f *Fingerprint) { f.Driver = "13.1" }), []Difference{{"driver", "13.0", "13.1"}}},
		{"driver's release", with(func(f *Fingerprint) { f.DriverRelease = "580.1" }), []Difference{{"driver_release", "", "580.1"}}},
		{"cublaslt", with(func(f *Fingerprint) { f.CublasLt = "13.2.0" }), []Difference{{"cublaslt", "13.1.0", "13.2.0"}}},
		{"algorithms", with(func(f *Fingerprint) { f.Algorithms = "first" }), []Difference{{"algorithms", "timed", "first"}}},
		{"attention", with(func(f *Fingerprint) { f.Attention = "wgmma" }), []Difference{{"attention", "", "wgmma"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, c.is.Since(was)); diff != "" {
				t.Error(diff)
			}
			raw, err := json.Marshal(c.is)
			if err != nil {
				t.Fatal(err)
			}
			var back Fingerprint
			if err := json.Unmarshal(raw, &back); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, back.Since(was)); diff != "" {
				t.Errorf("after JSON: %s", diff)
			}
		})
	}
}

func TestChoicesDigest(t *testing.T) {
	digest := func(c map[string]string) string { return Fingerprint{Choices: c}.ChoicesSHA256() }
	one := digest(map[string]string{"a": "1", "b": "2"})
	if again := digest(map[string]string{"b": "2", "a": "1"}); again != one || len(one) != 64 {
		t.Errorf("the same choices have digests %q and %q", one, again)
	}
	for _, other := range []map[string]string{nil, {"a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "b": "2", "c": "3"}} {
		if digest(other) == one {
			t.Errorf("%v has the digest of other choices", other)
		}
	}
	if digest(nil) != "" {
		t.Error("no choices have a digest")
	}
}
