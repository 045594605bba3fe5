package sensor

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"time"

	"trainerd/internal/fault"
)

// Bounds of an EVE file.
const (
	maxEVELine   = 1 << 20
	maxEVEAlerts = 100_000
	maxEVEText   = 200 // of a signature's name or category
)

// eveTime is Suricata's timestamp, such as 2026-01-02T15:04:05.123456+0000.
const eveTime = "2006-01-02T15:04:05.999999-0700"

// ReadEVE reads Suricata's EVE JSON lines and returns the alerts among them;
// other events are passed over. At counts from the first alert's timestamp. A
// line that is no JSON, or an alert without addresses or a time, is an error
// that names the line.
func ReadEVE(r io.Reader) ([]Alert, error) {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), maxEVELine)
	var out []Alert
	var first time.Time
	for line := 1; s.Scan(); line++ {
		bad := func(format string, args ...any) error {
			return fault.New(fault.Malformed, "bad_eve", "read EVE line %d: %s", line, fmt.Sprintf(format, args...))
		}
		text := bytes.TrimSpace(s.Bytes())
		if len(text) == 0 {
			continue
		}
		var e struct {
			Timestamp string `json:"timestamp"`
			EventType string `json:"event_type"`
			SrcIP     string `json:"src_ip"`
			SrcPort   int    `json:"src_port"`
			DestIP    string `json:"dest_ip"`
			DestPort  int    `json:"dest_port"`
			Proto     string `json:"proto"`
			Alert     struct {
				SignatureID int    `json:"signature_id"`
				Signature   string `json:"signature"`
				Category    string `json:"category"`
				Severity    int    `json:"severity"`
			} `json:"alert"`
		}
		if err := json.Unmarshal(text, &e); err != nil {
			return nil, bad("%v", err)
		}
		if e.EventType != "alert" {
			continue
		}
		at, err := time.Parse(eveTime, e.Timestamp)
		if err != nil {
			return nil, bad("timestamp %.40q, expected %s", e.Timestamp, eveTime)
		}
		src, err := netip.ParseAddr(e.SrcIP)
		if err != nil {
			return nil, bad("src_ip %.40q, expected an address", e.SrcIP)
		}
		dst, err := netip.ParseAddr(e.DestIP)
		if err != nil {
			return nil, bad("dest_ip %.40q, expected an address", e.DestIP)
		}
		if len(out) == maxEVEAlerts {
			return nil, fault.New(fault.TooLarge, "bad_eve", "read EVE line %d: more than %d alerts", line, maxEVEAlerts)
		}
		if len(out) == 0 {
			first = at
		}
		out = append(out, Alert{
			At: at.Sub(first), Signature: e.Alert.SignatureID, Name: cut(e.Alert.Signature), Category: cut(e.Alert.Category), Severity: min(max(e.Alert.Severity, 1), 3),
			Proto: cut(e.Proto), Source: src.String(), Target: dst.String(), SourcePort: e.SrcPort, TargetPort: e.DestPort,
		})
	}
	if err := s.Err(); err != nil {
		return nil, fault.New(fault.Malformed, "bad_eve", "read EVE: %w", err)
	}
	return out, nil
}

// cut bounds a text and takes out what would end a line of a prompt.
func cut(s string) string {
	b := []rune(s)
	b = b[:min(len(b), maxEVEText)]
	for i, c := range b {
		if c < ' ' || c == 0x7f || c == 0x2028 || c == 0x2029 {
			b[i] = ' '
		}
	}
	return string(b)
}
