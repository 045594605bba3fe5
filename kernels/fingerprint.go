package kernels

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
)

// Fingerprinter is a Device that says what the bits of its results depend on.
type Fingerprinter interface {
	// Fingerprint may be called from any goroutine while the device is open.
	Fingerprint() Fingerprint
}

// Fingerprint is what the bits of a result depend on besides the operations and
// the program: two devices with equal ones give the same bits. What a kind of
// device does not have is empty.
type Fingerprint struct {
	Device        string `json:"device"`                   // "cpu" or "cuda", without a number
	Card          string `json:"card,omitempty"`           // as it names itself
	Instructions  string `json:"instructions,omitempty"`   // of the CPU device's code, "amd64 avx512"
	Driver        string `json:"driver,omitempty"`         // newest CUDA that it supports, "13.0"
	DriverRelease string `json:"driver_release,omitempty"` // "580.65.06"; empty where the system does not tell
	CublasLt      string `json:"cublaslt,omitempty"`       // "13.1.0"
	Algorithms    string `json:"algorithms,omitempty"`     // how those of matrix products are chosen: "timed" or "first"
	Attention     string `json:"attention,omitempty"`      // "wgmma" where a card's attention uses products of warpgroups
	// Choices are the algorithms that were timed so far, by class of products. A
	// device only adds to them; a class that is not there was not met.
	Choices map[string]string `json:"choices,omitempty"`
}

// FingerprintOf asks a device; one that does not say is known by its name and model.
func FingerprintOf(dev Device) Fingerprint {
	if f, ok := dev.(Fingerprinter); ok {
		return f.Fingerprint()
	}
	info := dev.Info()
	return Fingerprint{Device: info.Name, Card: info.Model}
}

// ChoicesSHA256 is the digest of the choices in the order of their names; empty without any.
func (f Fingerprint) ChoicesSHA256() string {
	if len(f.Choices) == 0 {
		return ""
	}
	h := sha256.New()
	for _, class := range slices.Sorted(maps.Keys(f.Choices)) {
		fmt.Fprintf(h, "%s\t%s\n", class, f.Choices[class])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Difference is one thing in which two fingerprints differ.
type Difference struct {
	Name string `json:"name"` // of the JSON member, or "choices: " and a class of products
	Was  string `json:"was"`
	Is   string `json:"is"`
}

// Since lists in what f differs from an earlier fingerprint. Choices that were
// added since are none: they decided nothing before. Ones that are gone are one,
// since they are timed anew.
func (f Fingerprint) Since(was Fingerprint) []Difference {
	var out []Difference
	for _, x := range []Difference{
		{"device", was.Device, f.Device}, {"card", was.Card, f.Card}, {"instructions", was.Instructions, f.Instructions},
		{"driver", was.Driver, f.Driver}, {"driver_release", was.DriverRelease, f.DriverRelease},
		{"cublaslt", was.CublasLt, f.CublasLt}, {"algorithms", was.Algorithms, f.Algorithms}, {"attention", was.Attention, f.Attention},
	} {
		if x.Was != x.Is {
			out = append(out, x)
		}
	}
	for _, class := range slices.Sorted(maps.Keys(was.Choices)) {
		if is := f.Choices[class]; is != was.Choices[class] {
			out = append(out, Difference{"choices: " + class, was.Choices[class], is})
		}
	}
	return out
}
