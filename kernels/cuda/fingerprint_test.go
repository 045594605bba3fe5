package cuda

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/kernels"
)

// TestFingerprint: versions and policy are named, choices are added as products
// are met, and a map once given does not change.
func TestFingerprint(t *testing.T) {
	d, l := newLaboratory(t, Options{Timed: true}, 5*time.Microsecond, 3*time.Microsecond)
	fresh := kernels.FingerprintOf(d)
	if fresh.Device != "cuda" || fresh.Card != "laboratory" || fresh.Driver != "13.0" || fresh.CublasLt != "13.1.0" || fresh.Algorithms != "timed" || len(fresh.Choices) != 0 {
		t.Errorf("a fresh device says %+v", fresh)
	}
	l.tokens(t, d, 100, false)
	one := d.Fingerprint()
	l.tokens(t, d, 100, false)
	l.tokens(t, d, 100, true) // of the same class: adding to C is no other product
	if again := d.Fingerprint(); again.ChoicesSHA256() != one.ChoicesSHA256() || len(one.Choices) != 1 {
		t.Errorf("one class of products gives %v, then %v", one.Choices, again.Choices)
	}
	l.tokens(t, d, 1000, false)
	two := d.Fingerprint()
	if len(fresh.Choices) != 0 || len(one.Choices) != 1 || len(two.Choices) != 2 {
		t.Errorf("%d, %d and %d choices, expected 0, 1 and 2", len(fresh.Choices), len(one.Choices), len(two.Choices))
	}
	if diff := two.Since(one); diff != nil {
		t.Errorf("a product that is met later is a difference: %v", diff)
	}
	for class, algorithm := range two.Choices {
		if !strings.HasPrefix(class, "m128 n") || len(algorithm) != 16 {
			t.Errorf("class %q has the choice %q", class, algorithm)
		}
	}

	first, l := newLaboratory(t, Options{}, 5*time.Microsecond, 3*time.Microsecond)
	l.tokens(t, first, 100, false)
	if f := first.Fingerprint(); f.Algorithms != "first" || f.Choices != nil {
		t.Errorf("with the policy first the device says %+v", f)
	}
}

// TestClassNames: every part of a class is in its name.
func TestClassNames(t *testing.T) {
	base := class{m: 1, n: 2, k: 3}
	seen := map[string]bool{base.String(): true}
	for _, change := range []func(*class){
		func(k *class) { k.m = 4 }, func(k *class) { k.n = 4 }, func(k *class) { k.k = 4 },
		func(k *class) { k.transA = true }, func(k *class) { k.transB = true }, func(k *class) { k.float32C = true }, func(k *class) { k.bias = true },
		func(k *class) { k.align[0] = 4 }, func(k *class) { k.align[1] = 4 }, func(k *class) { k.align[2] = 4 },
		func(k *class) { k.align[3] = 4 }, func(k *class) { k.align[4] = 4 }, func(k *class) { k.align[5] = 4 },
	} {
		k := base
		change(&k)
		if seen[k.String()] {
			t.Errorf("%q names two classes", k)
		}
		seen[k.String()] = true
	}
	for i := range (algorithm{}) {
		var a, b choice
		a.algorithm[i], b.algorithm[i] = 1<<56, 1
		if a.String() == b.String() || a.String() == (choice{own: true}).String() {
			t.Errorf("word %d of an algorithm is not in its name", i)
		}
	}
}

func TestDriverRelease(t *testing.T) {
	file := filepath.Join(t.TempDir(), "version")
	if got := driverRelease(file); got != "" {
		t.Errorf("without the file the release is %q", got)
	}
	for text, want := range map[string]string{"580.65.06\n": "580.65.06", strings.Repeat("x", 100): ""} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := driverRelease(file); got != want {
			t.Errorf("%q is release %q, expected %q", text, got, want)
		}
	}
}
