package plot

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// A Line is one series of a line plot; Low and High, where given, are a band around it.
type Line struct {
	Name      string
	X, Y      []float64
	Low, High []float64
}

// colours that stay apart for most kinds of sight (Okabe and Ito).
var colours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"}

const (
	svgWidth, svgHeight              = 720, 400
	svgLeft, svgRight, svgTop, svgAt = 60, 20, 40, 50 // margins; svgAt is the lower one
)

// svg collects the elements of a picture.
type svg struct {
	b strings.Builder
}

func newSVG(width, height int, title string) *svg {
	s := &svg{}
	fmt.Fprintf(&s.b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height, width, height)
	fmt.Fprintf(&s.b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	s.text(float64(width)/2, 22, "middle", title)
	return s
}

func (s *svg) text(x, y float64, anchor, text string) {
	fmt.Fprintf(&s.b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, html.EscapeString(text))
}

func (s *svg) line(x1, y1, x2, y2 float64, colour string) {
	fmt.Fprintf(&s.b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x1, y1, x2, y2, colour)
}

func (s *svg) bytes() []byte { return []byte(s.b.String() + "</svg>\n") }

// LinePlot draws series with y from 0 to top; values outside are cut off.
func LinePlot(title, x, y string, top float64, lines []Line) []byte {
	s := newSVG(svgWidth, svgHeight, title)
	most := 1.0
	for _, l := range lines {
		for _, v := range l.X {
			most = max(most, v)
		}
	}
	px := func(v float64) float64 { return svgLeft + v/most*(svgWidth-svgLeft-svgRight) }
	py := func(v float64) float64 {
		return svgHeight - svgAt - min(max(v/top, 0), 1)*(svgHeight-svgTop-svgAt)
	}
	for i := range 6 {
		v := top * float64(i) / 5
		s.line(svgLeft, py(v), svgWidth-svgRight, py(v), "#dddddd")
		s.text(svgLeft-6, py(v)+4, "end", short(v))
		v = most * float64(i) / 5
		s.text(px(v), svgHeight-svgAt+18, "middle", short(v))
	}
	s.text(svgWidth/2, svgHeight-10, "middle", x)
	s.text(svgLeft-50, svgTop-8, "start", y)
	for i, l := range lines {
		colour := colours[i%len(colours)]
		if len(l.Low) == len(l.X) && len(l.High) == len(l.X) && len(l.X) > 0 {
			var p []string
			for k := range l.X {
				p = append(p, fmt.Sprintf("%.1f,%.1f", px(l.X[k]), py(l.High[k])))
			}
			for k := len(l.X) - 1; k >= 0; k-- {
				p = append(p, fmt.Sprintf("%.1f,%.1f", px(l.X[k]), py(l.Low[k])))
			}
			fmt.Fprintf(&s.b, `<polygon points="%s" fill="%s" fill-opacity="0.15"/>`+"\n", strings.Join(p, " "), colour)
		}
		var p []string
		for k := range l.X {
			p = append(p, fmt.Sprintf("%.1f,%.1f", px(l.X[k]), py(l.Y[k])))
		}
		fmt.Fprintf(&s.b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(p, " "), colour)
		at := float64(svgTop + 14*i + 4)
		s.line(svgLeft+10, at, svgLeft+30, at, colour)
		s.text(svgLeft+36, at+4, "start", l.Name)
	}
	return s.bytes()
}

// Bars draws, for every name, one bar for each series; values are shares.
func Bars(title string, names, series []string, value func(name, series int) float64) []byte {
	const left, right, bar = 170, 60, 9
	row := bar*len(series) + 8
	height := svgTop + row*len(names) + 40
	s := newSVG(svgWidth, height, title)
	for i, name := range names {
		y := float64(svgTop + i*row)
		s.text(left-8, y+float64(row)/2, "end", name)
		for k := range series {
			v := min(max(value(i, k), 0), 1)
			w := v * (svgWidth - left - right)
			fmt.Fprintf(&s.b, `<rect x="%d" y="%.1f" width="%.1f" height="%d" fill="%s"/>`+"\n", left, y+float64(k*bar), w, bar-1, colours[k%len(colours)])
			s.text(left+w+4, y+float64(k*bar)+bar-1, "start", fmt.Sprintf("%.0f %%", 100*v))
		}
	}
	at := left
	for k, name := range series {
		fmt.Fprintf(&s.b, `<rect x="%d" y="%d" width="10" height="10" fill="%s"/>`+"\n", at, height-24, colours[k%len(colours)])
		s.text(float64(at+14), float64(height-15), "start", name)
		at += 150
	}
	return s.bytes()
}

func short(v float64) string {
	if v == math.Trunc(v) || math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
