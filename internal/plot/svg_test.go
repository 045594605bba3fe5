package plot

import (
	"bytes"
	"encoding/xml"
	"io"
	"strings"
	"testing"
)

func wellFormed(t *testing.T, name string, picture []byte) {
	t.Helper()
	dec := xml.NewDecoder(bytes.NewReader(picture))
	for {
		_, err := dec.Token()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, picture)
		}
	}
}

func TestPictures(t *testing.T) {
	p := LinePlot("a <b> & c", "x", "y", 100, []Line{{Name: "l<", X: []float64{0, 10}, Y: []float64{0, 100}, Low: []float64{0, 90}, High: []float64{5, 100}}, {Name: "empty"}})
	wellFormed(t, "lines", p)
	// 0 lies at the lower left corner of the axes, 100 at step 10 at the upper right.
	if !strings.Contains(string(p), `<polyline points="60.0,350.0 700.0,40.0"`) || !strings.Contains(string(p), "<polygon") {
		t.Errorf("points of the line:\n%s", p)
	}
	b := Bars("t", []string{"one", "two"}, []string{"s"}, func(i, _ int) float64 { return float64(i) / 2 })
	wellFormed(t, "bars", b)
	if !strings.Contains(string(b), "50 %") || !strings.Contains(string(b), `width="245.0"`) {
		t.Errorf("a bar of a half:\n%s", b)
	}
}

func TestShort(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 20: "20", 0.25: "0.25", 1638.4: "1638", 12.5: "12.5", 100: "100", -3.14159: "-3.14"} {
		if got := short(v); got != want {
			t.Errorf("short(%v) is %q, expected %q", v, got, want)
		}
	}
}
