package cuda

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"trainerd/kernels"
)

var _ kernels.Fingerprinter = (*Device)(nil)

// releaseFile holds the release of the loaded kernel driver.
const releaseFile = "/sys/module/nvidia/version"

// Fingerprint implements kernels.Fingerprinter. With the policy first there are no
// choices: what the library likes best follows from its version and the card.
func (d *Device) Fingerprint() kernels.Fingerprint {
	f := kernels.Fingerprint{Device: "cuda", Card: d.choices.here.Card, Driver: version(d.choices.here.Driver), DriverRelease: d.choices.release,
		CublasLt: libraryVersion(d.choices.here.CublasLt), Algorithms: "first"}
	if d.choices.timed {
		f.Algorithms, f.Choices = "timed", *d.choices.seen.Load()
	}
	if d.wgmma {
		f.Attention = AttentionWgmma
	}
	return f
}

// driverRelease reads the file of the kernel driver, if it is one.
func driverRelease(file string) string {
	b, err := os.ReadFile(file)
	if err != nil || len(b) > 64 {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// libraryVersion writes cuBLASLt's 10000*major + 100*minor + patch.
func libraryVersion(v int) string { return fmt.Sprintf("%d.%d.%d", v/10000, v%10000/100, v%100) }

// publish makes the choices so far visible to Fingerprint: a map of its own that
// nobody changes. On the owner, after classes has changed.
func (s *choices) publish() {
	m := make(map[string]string, len(s.classes))
	for k, c := range s.classes {
		m[k.String()] = c.String()
	}
	s.seen.Store(&m)
}

// String names a class of products: sizes, N or T of each factor, type of the
// result, bias, and the alignments of a, b, c and their strides in bytes.
func (k class) String() string {
	letter := map[bool]string{false: "N", true: "T"}
	s := fmt.Sprintf("m%d n%d k%d %s%s bf16", k.m, k.n, k.k, letter[k.transA], letter[k.transB])
	if k.float32C {
		s = strings.TrimSuffix(s, "bf16") + "f32"
	}
	if k.bias {
		s += " bias"
	}
	at := make([]string, len(k.align))
	for i, a := range k.align {
		at[i] = fmt.Sprint(1 << a)
	}
	return s + " align " + strings.Join(at, ",")
}

// String is short and differs where the algorithms do.
func (c choice) String() string {
	if c.own {
		return ownName
	}
	sum := sha256.Sum256([]byte(c.algorithm.hex()))
	return hex.EncodeToString(sum[:8])
}
