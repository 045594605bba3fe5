package storage

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"trainerd/internal/fault"
)

const (
	// ManifestVersion is the version this package writes and reads.
	ManifestVersion = 1
	// MaxManifest bounds an encoded manifest in bytes.
	MaxManifest = 8 << 20
	// maxFileName leaves room for the checkpoint's prefix in a key of MaxKey bytes.
	maxFileName = 512
	// manifestName and claimName are the two names of a checkpoint's prefix that files cannot have.
	manifestName = "manifest.json"
	claimName    = "claim.json"
)

// Manifest describes one whole checkpoint. It is the last object written.
type Manifest struct {
	Version  int            `json:"version"` // 1
	Job      string         `json:"job"`
	Step     int64          `json:"step"`
	Attempt  int            `json:"attempt"`
	Prefix   string         `json:"prefix"` // "jobs/{job}/checkpoints/{step:08d}-{attempt}"
	Parent   *int64         `json:"parent,omitempty"`
	Engine   string         `json:"engine"` // trainerd version that wrote it
	Created  time.Time      `json:"created"`
	Snapshot bool           `json:"snapshot"` // state/ is present
	Files    []File         `json:"files"`    // sorted by name
	Extra    map[string]any `json:"extra,omitempty"`
}

// File is one file of a checkpoint, named relative to its prefix ("hf/config.json").
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // lower-case hex
}

// File returns the entry of a file by its name.
func (m Manifest) File(name string) (File, bool) {
	i, ok := slices.BinarySearchFunc(m.Files, name, func(f File, name string) int { return strings.Compare(f.Name, name) })
	if !ok {
		return File{}, false
	}
	return m.Files[i], true
}

// Bytes is the sum of the sizes of the files whose name has the prefix.
func (m Manifest) Bytes(prefix string) int64 {
	var n int64
	for _, f := range m.Files {
		if strings.HasPrefix(f.Name, prefix) {
			n += f.Size
		}
	}
	return n
}

// Digest is the SHA-256 of the manifest's bytes, which latest.json and nodes name it by.
func (m Manifest) Digest() (string, error) {
	raw, err := EncodeManifest(m)
	if err != nil {
		return "", err
	}
	return hexSHA256(raw), nil
}

// newer reports whether (step, attempt) of m comes after another pair.
func (m Manifest) newer(step int64, attempt int) bool {
	return m.Step > step || m.Step == step && m.Attempt > attempt
}

// EncodeManifest validates m and returns its bytes: what DecodeManifest reads.
func EncodeManifest(m Manifest) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_manifest", "encode manifest: %w", err)
	}
	data = append(data, '\n')
	if len(data) > MaxManifest {
		return nil, fault.New(fault.TooLarge, "manifest_too_large", "encode manifest: got %d bytes, expected at most %d", len(data), MaxManifest)
	}
	return data, nil
}

// DecodeManifest reads a manifest and refuses everything that EncodeManifest
// would not write: unknown members, another version, names that leave the
// checkpoint or clash, sizes and digests out of form.
func DecodeManifest(data []byte) (Manifest, error) {
	var m Manifest
	if err := decodeStrict(data, MaxManifest, "manifest", &m); err != nil {
		return Manifest{}, err
	}
	if err := m.Validate(); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// decodeStrict decodes one JSON value of at most limit bytes and nothing after it.
func decodeStrict(data []byte, limit int, what string, v any) error {
	if len(data) > limit {
		return fault.New(fault.TooLarge, what+"_too_large", "decode %s: got %d bytes, expected at most %d", what, len(data), limit)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fault.New(fault.Malformed, "bad_"+what, "decode %s: %w", what, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fault.New(fault.Malformed, "bad_"+what, "decode %s: got data after the end, expected one JSON object", what)
	}
	return nil
}

// Validate says whether m could be the manifest of a whole checkpoint.
func (m Manifest) Validate() error {
	bad := func(name string, got any, expected string) error {
		return fault.BadField("manifest."+name, got, expected)
	}
	if m.Version != ManifestVersion {
		return bad("version", m.Version, fmt.Sprintf("%d (written by another trainerd?)", ManifestVersion))
	}
	if err := CheckJob(m.Job); err != nil {
		return err
	}
	if m.Step < 0 {
		return bad("step", m.Step, "0 or more")
	}
	if m.Attempt < 0 {
		return bad("attempt", m.Attempt, "0 or more")
	}
	if want := prefixOf(m.Job, m.Step, m.Attempt); m.Prefix != want {
		return bad("prefix", fmt.Sprintf("%q", m.Prefix), fmt.Sprintf("%q", want))
	}
	if m.Parent != nil && (*m.Parent < 0 || *m.Parent > m.Step) {
		return bad("parent", *m.Parent, "a step from 0 to the checkpoint's own")
	}
	if len(m.Files) == 0 {
		return bad("files", "none", "at least one file")
	}
	return m.validateFiles()
}

func (m Manifest) validateFiles() error {
	names := make(map[string]bool, len(m.Files))
	var total int64
	state := false
	for i, f := range m.Files {
		bad := func(member string, got any, expected string) error {
			return fault.BadField(fmt.Sprintf("manifest.files[%d].%s", i, member), got, expected)
		}
		if err := checkFileName(f.Name); err != nil {
			return bad("name", fmt.Sprintf("%.80q", f.Name), "a clean relative file name: "+err.Error())
		}
		if i > 0 && f.Name <= m.Files[i-1].Name {
			return bad("name", fmt.Sprintf("%q", f.Name), "names sorted and unique")
		}
		names[f.Name] = true
		if f.Size < 0 || f.Size > math.MaxInt64-total {
			return bad("size", f.Size, "0 or more, and a sum that fits in 63 bits")
		}
		total += f.Size
		if digest, err := hex.DecodeString(f.SHA256); err != nil || len(digest) != 32 || strings.ToLower(f.SHA256) != f.SHA256 {
			return bad("sha256", fmt.Sprintf("%.80q", f.SHA256), "64 lower-case hex digits")
		}
		state = state || strings.HasPrefix(f.Name, "state/")
	}
	// A name that is also a directory of another cannot be pulled into a file system.
	for _, f := range m.Files {
		for i := range len(f.Name) {
			if f.Name[i] == '/' && names[f.Name[:i]] {
				return fault.BadField("manifest.files", fmt.Sprintf("%q and %q", f.Name[:i], f.Name), "no file inside another file")
			}
		}
	}
	if state != m.Snapshot {
		return fault.BadField("manifest.snapshot", m.Snapshot, fmt.Sprintf("%v, as state/ files say", state))
	}
	return nil
}

// checkFileName refuses what CheckKey refuses and the names of the layout itself.
func checkFileName(name string) error {
	if why := keyFault(name); why != "" {
		return fmt.Errorf("expected %s", why)
	}
	if len(name) > maxFileName {
		return fmt.Errorf("expected at most %d bytes", maxFileName)
	}
	if first, _, _ := strings.Cut(name, "/"); first == manifestName || first == claimName {
		return fmt.Errorf("expected another name than %s", first)
	}
	return nil
}
