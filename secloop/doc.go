package secloop
